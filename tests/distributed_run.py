"""One uptraining run after another on tiny models, in as many processes as there are; what came out goes to files.

Run by `test_uptrain_distributed`: in its own process, and as `torchrun distributed_run.py SCENARIOS FOLDER WRAPPER`.
WRAPPER is one, ddp, fsdp2, or "accelerate fsdp2" where the environment asks for it.
`distributed_run.py uptrain ...` is `hf-gqa uptrain ...`, sharded.
"""

import json
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from hf_gqa import cli
from hf_gqa.convert.donor import open_donor
from hf_gqa.refusal import Refusal
from hf_gqa.uptrain import run as uptrain_run
from hf_gqa.uptrain.callback import UptrainCallback
from hf_gqa.uptrain.phases import Phase
from hf_gqa.uptrain.trainer import UptrainTrainer
from tests.tiny_donors import VOCAB_SIZE


LENGTH, GLOBAL_ROWS = 16, 8
FSDP = {"version": 2, "state_dict_type": "FULL_STATE_DICT", "reshard_after_forward": True}
FSDP |= {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "cpu_ram_efficient_loading": False}
KNOWN = {field.name for field in fields(TrainingArguments)}
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in KNOWN else "gradient_checkpointing"


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Args:
    phases: as dicts.
    steps, accumulation: optimizer steps; micro-batches of each. The rows of a step are the same over any number.
    evaluate: every second step.
    stop_after: end at this step, with a checkpoint, as if it had been killed there.
    resume: go on from the checkpoint in the scenario's folder.
    poison: one number of the gradient is not finite at this step; where it is sharded, in the last process's shard.
    folder: of checkpoints and export; by default the scenario's name.
    """

    name: str
    phases: list[dict]
    steps: int = 6
    accumulation: int = 1
    checkpointing: bool = False
    evaluate: bool = False
    export: bool = False
    save_steps: int = 0
    stop_after: int = 0
    resume: bool = False
    poison: int = 0
    folder: str = ""
    fsdp: dict = field(default_factory=dict)


class Rows(torch.utils.data.Dataset):
    """Two documents in each row; how many tokens count differs a lot between rows."""

    def __init__(self, count: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.rows = [self._row(index, generator) for index in range(count)]

    def _row(self, index: int, generator: torch.Generator) -> dict:
        tokens = torch.randint(3, VOCAB_SIZE, (LENGTH,), generator=generator)
        cut = int(torch.randint(3, LENGTH - 3, (1,), generator=generator))
        labels = tokens.clone()
        labels[[0, cut]] = -100
        if index % 3:
            labels[: int(torch.randint(1, LENGTH - 2, (1,), generator=generator))] = -100
        positions = torch.cat([torch.arange(cut), torch.arange(LENGTH - cut)])
        return {"input_ids": tokens, "position_ids": positions, "labels": labels}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


class Incident(TrainerCallback):
    """Ends a run early, or spoils one number of one process's gradient."""

    def __init__(self, scenario: Scenario):
        self.scenario = scenario

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 != self.scenario.poison:
            return
        gradient = next(tensor.grad for tensor in model.parameters() if tensor.grad is not None)
        if not isinstance(gradient, DTensor):
            gradient.view(-1)[0] = float("nan")
        elif args.process_index == args.world_size - 1:
            gradient.to_local().view(-1)[0] = float("nan")

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.scenario.stop_after
        return control


@dataclass
class ShardedArguments(TrainingArguments):
    """accelerate shards on accelerators only; gloo can do it too."""

    def __post_init__(self):
        super().__post_init__()
        assert self.distributed_state.distributed_type == DistributedType.MULTI_CPU
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


class InOrder(UptrainTrainer):
    def checkpoint_facts(self) -> dict:
        return {"data": "rows"}

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def arguments(scenario: Scenario, folder: Path, wrapper: str) -> TrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    options = {"fsdp": True, "fsdp_config": FSDP | scenario.fsdp} if wrapper == "fsdp2" else {}
    options |= {"eval_strategy": "steps", "eval_steps": 2} if scenario.evaluate else {}
    options |= {"save_steps": scenario.save_steps} if scenario.save_steps else {"save_strategy": "no"}
    return (ShardedArguments if wrapper.endswith("fsdp2") else TrainingArguments)(
        str(folder),
        **{"max_steps": scenario.steps, CHECKPOINTING: scenario.checkpointing, "adam_epsilon": 1e-4},
        **{"learning_rate": 1e-2, "weight_decay": 0.01, "logging_steps": 1, "seed": 3, "use_cpu": True},
        **{"report_to": "none", "disable_tqdm": True, "remove_unused_columns": False},
        per_device_train_batch_size=GLOBAL_ROWS // processes // scenario.accumulation,
        per_device_eval_batch_size=4 // processes,
        gradient_accumulation_steps=scenario.accumulation,
        dataloader_pin_memory=False,
        **options,
    )


def make_trainer(scenario: Scenario, folder: Path, wrapper: str) -> InOrder:
    run_dir = folder / (scenario.folder or scenario.name)
    student = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float64)
    uptrain = UptrainCallback(
        budget_tokens=scenario.steps * GLOBAL_ROWS * LENGTH,
        tokens_per_step=GLOBAL_ROWS * LENGTH,
        phases=tuple(map(Phase.from_dict, scenario.phases)),
        export_dir=run_dir / "export" if scenario.export else None,
        source=folder / "student",
    )
    return InOrder(
        model=student,
        args=arguments(scenario, run_dir, wrapper),
        train_dataset=Rows(scenario.steps * GLOBAL_ROWS, seed=1),
        eval_dataset=Rows(7, seed=2) if scenario.evaluate else None,
        uptrain=uptrain,
        teacher=open_donor(folder / "donor"),
        callbacks=[Incident(scenario)],
    )


def whole_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    if isinstance(next(model.parameters()), DTensor):
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def processes_agree(weights: dict[str, torch.Tensor], sharded: bool) -> bool:
    """Whether all processes hold the same weights, bit for bit."""
    if not dist.is_initialized() or sharded:
        return True
    worst = torch.zeros(())
    for tensor in weights.values():
        first = tensor.clone()
        dist.broadcast(first, 0)
        worst = torch.maximum(worst, (first != tensor).any().float())
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return not worst


def run(scenario: Scenario, folder: Path, wrapper: str = "one") -> None:
    """Train; write log, facts and weights to `folder`/`name`.json and .safetensors. All processes call this."""
    trainer = make_trainer(scenario, folder, wrapper)
    memory, refusal = trainer.teacher_memory(), ""
    try:
        trainer.train(resume_from_checkpoint=scenario.resume)
    except Refusal as error:
        refusal = str(error)
    sharded = isinstance(next(trainer.model.parameters()), DTensor)
    weights = whole_weights(trainer.model)
    facts = {
        "log": trainer.state.log_history,
        "refusal": refusal,
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "wrapper": type(trainer.model_wrapped).__name__,
        "sharded": sharded,
        "agree": processes_agree(weights, sharded),
        "teacher_shared_bytes": memory.shared_bytes,
        "teacher_own_bytes": memory.own_bytes,
    }
    refused = [refusal]
    if dist.is_initialized():
        refused = [None] * facts["world_size"]
        dist.all_gather_object(refused, refusal)
    if trainer.is_world_process_zero():
        save_file(
            {name: tensor.contiguous() for name, tensor in weights.items()}, folder / f"{scenario.name}.safetensors"
        )
        text = json.dumps(facts | {"refused": refused}, indent=1)
        (folder / f"{scenario.name}.json").write_text(text, encoding="utf-8")


def main(scenarios: str, folder: str, wrapper: str) -> None:
    torch.set_num_threads(1)
    for values in json.loads(Path(scenarios).read_text(encoding="utf-8")):
        run(Scenario(**values), Path(folder), wrapper)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def sharded_command() -> None:
    """The command line of hf-gqa, sharded on CPU."""
    uptrain_run.TrainingArguments = ShardedArguments
    cli.main()


if __name__ == "__main__":
    sharded_command() if sys.argv[1] == "uptrain" else main(*sys.argv[1:])
