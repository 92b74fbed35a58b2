"""The fields of an uptraining recipe as options, for each command that trains or prepares training."""

from ..uptrain.objectives import OBJECTIVES
from ..uptrain.phases import TRAINED
from ..uptrain.recipe import UptrainRecipe
from .recipe_options import with_options_of


HELP = {
    "teacher": "Donor to distil from: folder or Hub repository.",
    "teacher_dtype": "Load the teacher as a model of its own, float32 or bfloat16; else it uses the student's frozen tensors.",
    "teacher_device_map": "The same, where: cpu, cuda:1, or auto to spread it over what there is.",
    "teacher_logits": "Folder of `hf-gqa teacher-logits`, in place of running the teacher.",
    "train_file": "Text: .txt, .jsonl, .parquet, or folders of them; repeatable.",
    "dataset_name": "Text: a dataset on the Hub or in a folder.",
    "dataset_config_name": "Its configuration.",
    "dataset_split": "Its split; 'train' if not said.",
    "text_column": "Column to read; 'text', else 'messages', if not said.",
    "streaming": "Read the dataset as it comes.",
    "sample_from_teacher": "No text at all: the donor writes it.",
    "sampled_tokens": "How much it writes; the budget if not said.",
    "eval_file": "Text to evaluate on; else some of the text is held out.",
    "eval_tokens": "How much is held out.",
    "budget_tokens": "Tokens to train on.",
    "budget_fraction": "The same, as a fraction of --pretraining-tokens; 0.05 in the GQA paper.",
    "pretraining_tokens": "Tokens that the donor was pre-trained on.",
    "objective": f"One of {', '.join(OBJECTIVES.names())}; distill if there is a teacher.",
    "train": f"Parameters to train: {', '.join(TRAINED)}; the objective's choice if not said.",
    "lora_rank": "Train adapters of this rank, and key and value projections in full.",
    "load_in_4bit": "QLoRA: keep all that is not trained in four bits. Needs bitsandbytes.",
    "learning_rate": "Peak; 0.256 / hidden_size if not said.",
    "sequence_length": "Tokens per row; what the student can, up to 1024, if not said.",
    "attend_across_documents": "Let the documents of a packed row see each other.",
    "per_device_train_batch_size": "Rows; as many as leave some 300 steps if not said.",
    "gradient_accumulation_steps": "Batches per step.",
    "gradient_checkpointing": "Less memory, more time; never reentrant.",
    "bf16": "Compute in bfloat16, with weights in --dtype.",
    "dtype": "Of the weights while they are trained: float32 or bfloat16.",
    "torch_compile": "Compile the student.",
    "seed": "Of the order of the text, of sampled text, of adapters.",
    "logging_steps": "How often losses are logged.",
    "eval_steps": "How often the held-out text is evaluated.",
    "save_steps": "How often a checkpoint is saved; with --export best, whenever it is evaluated.",
    "export": "Write the 'last' student, or the 'best' by held-out loss.",
}
with_uptrain_options = with_options_of(UptrainRecipe, HELP)
