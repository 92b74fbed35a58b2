"""The same scenarios of training in two processes and in one."""

import json
import socket
from pathlib import Path

import torch

from tests import warm_process
from tests.distributed_run import Scenario, run


TESTS = Path(__file__).parent


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def torchrun(scenarios: dict[str, dict], folder: Path, wrapper: str) -> Path:
    """What torchrun does, with processes that start in no time; what `accelerate launch` starts has all to import."""
    listed, log = folder / "scenarios.json", folder / "log.txt"
    listed.write_text(json.dumps([{"name": name, **values} for name, values in scenarios.items()]))
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "GLOO_SOCKET_IFNAME": "lo"}
    command = [TESTS / "distributed_run.py", listed, folder, wrapper]
    processes = [
        warm_process.start(command, folder, log, log, RANK=rank, LOCAL_RANK=rank, **where) for rank in ("0", "1")
    ]
    for process in processes:
        process.join(timeout=300)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0, 0], log.read_text(errors="replace")[-8000:]
    return folder


def in_this_process(scenarios: dict[str, dict], folder: Path) -> Path:
    for name, values in scenarios.items():
        run(Scenario(name=name, **values), folder)
    return folder


def facts_in(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    assert one.keys() == other.keys()
    return max((one[name].double() - other[name].double()).abs().max().item() for name in other)


def numbers_of(entry: dict) -> dict:
    clocks = ("runtime", "per_second", "flos")
    return {name: value for name, value in entry.items() if not any(clock in name for clock in clocks)}
