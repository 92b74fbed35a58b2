"""Push a student to the Hub, or, when offline, write the folder that would be pushed.

Run: `python examples/push.py STUDENT [REPO_ID]`, after `hf auth login`. Repositories are created private.
With HF_HUB_OFFLINE=1, or without REPO_ID, it writes ./pushed/<name> instead.
The same from a shell: `hf-gqa push STUDENT REPO_ID`, which insists on a model card (`hf-gqa card`).
"""

import sys
from pathlib import Path

from huggingface_hub import constants

from hf_gqa.export.push import plan_push, upload, write_instead


def main(student_name: str = "students/prose-gqa-2", repo_id: str | None = None) -> None:
    student = Path(student_name)
    plan = plan_push(student, repo_id or student.name, needs_card=False)  # verifies, and refuses what does not belong
    print(f"{plan.title}: {', '.join(plan.files)}, {plan.size_bytes:,} bytes")
    if repo_id is None or constants.HF_HUB_OFFLINE:
        print(f"wrote {write_instead(plan, Path('pushed') / student.name, overwrite=True)}, nothing was sent")
    else:
        print(f"pushed {upload(plan).url}")


if __name__ == "__main__":
    main(*sys.argv[1:])
