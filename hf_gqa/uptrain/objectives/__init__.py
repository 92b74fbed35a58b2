"""Ready-made phases, one file each; the file's name is the name that `--objective` takes. A file defines `PHASES`."""

from ...registry import Registry


OBJECTIVES = Registry(__name__, "objective", "PHASES")
