"""`python -m hf_gqa.cli`, for launchers that start modules."""

from . import main


main()
