"""Push a student to the Hub, or, when offline, write the folder that would be pushed.

Run: `python examples/push.py STUDENT [REPO_ID]`, after `hf auth login`. Repositories are created private.
With HF_HUB_OFFLINE=1, or without REPO_ID, it writes ./pushed/<name> instead.
"""

import shutil
import sys
from pathlib import Path

from huggingface_hub import HfApi, constants

from hf_gqa import verify


def main(student_name: str = "students/prose-gqa-2", repo_id: str | None = None) -> None:
    student = Path(student_name)
    failed = [check for check in verify(student) if check.passed is False]
    if failed:
        sys.exit(f"{student}: not pushed, {failed[0].name}: {failed[0].detail}")
    if repo_id is None or constants.HF_HUB_OFFLINE:
        folder = Path("pushed") / student.name
        shutil.copytree(student, folder, dirs_exist_ok=True)
        print(f"offline: wrote {folder} ({', '.join(sorted(path.name for path in folder.iterdir()))})")
    else:
        HfApi().create_repo(repo_id, private=True, exist_ok=True)
        print(HfApi().upload_folder(repo_id=repo_id, folder_path=student, commit_message="Grouped-query student"))


if __name__ == "__main__":
    main(*sys.argv[1:])
