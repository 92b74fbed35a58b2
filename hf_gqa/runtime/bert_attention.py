"""What BERT and its descendants call the things that planned attention reads by other names."""


class BertAttentionNames:
    """Mixin between planned attention and a native attention class with BERT's names."""

    @property
    def head_dim(self) -> int:
        return self.attention_head_size

    @property
    def attention_dropout(self) -> float:
        return self.dropout.p
