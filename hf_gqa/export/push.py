"""Push a student to the Hub: verified, private unless asked otherwise, in one commit that holds its recipe."""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from ..convert.donor import Donor
from ..convert.manifest import Manifest
from ..evaluate.report import REPORT_FILE, Report
from ..refusal import Refusal
from ..staging import check_apart, check_output, file_sha256, git_blob_sha1, staged_folder
from .card_lint import lint_card
from .model_card import is_ours
from .pushed_files import CARD_FILE, EVALUATION_FOLDER, files_to_push
from .verify import CheckFailed, verify


LOADED_IF_LEFT_BEHIND = re.compile(r"[^/]+\.(safetensors|safetensors\.index\.json|py)")
DEFAULT_BRANCH = "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class PushPlan:
    """What will be pushed, all checked.

    Args:
        folder: of the student.
        files: paths within it.
        revision: branch.
        title, description: of the commit; the description is the recipe as YAML.
    """

    folder: Path
    repo_id: str
    public: bool
    revision: str
    files: tuple[str, ...]
    size_bytes: int
    title: str
    description: str

    def to_dict(self) -> dict:
        return asdict(self) | {"folder": str(self.folder)}


@dataclass(frozen=True, slots=True, kw_only=True)
class PushResult:
    """What was pushed.

    Args:
        files: that are there now.
        uploaded: those of them that were not there before, or were other ones.
        removed: weights and code of an earlier push that the student does not have; git keeps them in its history.
        commit, url: on the Hub; of the commit that was there if nothing was to be done.
    """

    repo_id: str
    public: bool
    revision: str
    files: tuple[str, ...]
    uploaded: tuple[str, ...]
    removed: tuple[str, ...]
    commit: str
    url: str

    def to_dict(self) -> dict:
        return asdict(self)


def plan_push(
    student: str | Path,
    repo_id: str,
    *,
    public: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    donor: Donor | None = None,
    trust_remote_code: bool = False,
    needs_card: bool = True,
) -> PushPlan:
    """Check everything that can be checked here; nothing is sent.

    Args:
        repo_id: `owner/name`, or `name` for the owner of the token.
        revision: branch, made if there is none; None: main.
        commit_message: first line of the message; None: says donor and heads.
        donor, trust_remote_code: as for `verify`.
        needs_card: refuse a student without README.md.

    Raises:
        CheckFailed: `verify` found something wrong.
        Refusal: a bad name, no card or one that its report does not bear out, or a file that does not belong.
    """
    folder = Path(student).expanduser()
    _check_names(repo_id, revision, commit_message)
    failed = [check for check in verify(folder, donor, trust_remote_code=trust_remote_code) if check.passed is False]
    if failed:
        raise CheckFailed(f"{folder}: not pushed, a check failed: {failed[0].name} ({failed[0].detail}).")
    manifest = Manifest.read(folder)
    files = files_to_push(folder, manifest, get_token())
    _check_card(folder, needs_card)
    return PushPlan(
        folder=folder,
        repo_id=repo_id,
        public=public,
        revision=revision or DEFAULT_BRANCH,
        files=files,
        size_bytes=sum((folder / file).stat().st_size for file in files),
        title=commit_message or _title(manifest),
        description=_description(manifest),
    )


def push(
    student: str | Path, repo_id: str, *, announce: Callable[[PushPlan], None] = lambda plan: None, **options
) -> PushResult:
    """Check the student and upload it.

    Args:
        announce: gets the plan before anything is sent.
        options: as for `plan_push`.

    Raises:
        Refusal: as for `plan_push`; not logged in, no permission, or a repository of another visibility.
        OSError: the Hub cannot be reached, or fails.
    """
    plan = plan_push(student, repo_id, **options)
    announce(plan)
    return upload(plan)


def upload(plan: PushPlan) -> PushResult:
    """One commit, so that nobody ever loads half a student; of what has changed, and none if nothing has."""
    if constants.HF_HUB_OFFLINE:
        raise Refusal(f"{plan.repo_id}: HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it, or use --dry-run.")
    token = get_token()
    if token is None:
        raise Refusal(f"{plan.repo_id}: not logged in. Run hf auth login, or set HF_TOKEN, then push again.")
    with _clear_errors(plan.repo_id, token):
        api = HfApi(token=token)
        repo_id = api.create_repo(plan.repo_id, private=not plan.public, exist_ok=True).repo_id
        _check_visibility(plan, repo_id, api.model_info(repo_id).private)
        if plan.revision != DEFAULT_BRANCH:
            api.create_branch(repo_id, branch=plan.revision, exist_ok=True)
        parent = api.model_info(repo_id, revision=plan.revision).sha
        tree = api.list_repo_tree(repo_id, recursive=True, revision=parent)
        there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        removed = [file for file in there if LOADED_IF_LEFT_BEHIND.fullmatch(file) and file not in plan.files]
        uploaded = [file for file in plan.files if not _is_there(plan.folder / file, there.get(file))]
        operations = [CommitOperationAdd(file, str(plan.folder / file)) for file in uploaded]
        operations += [CommitOperationDelete(file) for file in removed]
        commit, url = parent, f"{constants.ENDPOINT}/{repo_id}/commit/{parent}"
        if operations:
            made = api.create_commit(
                repo_id,
                operations,
                commit_message=plan.title,
                commit_description=plan.description,
                revision=plan.revision,
                parent_commit=parent,  # what was compared
            )
            commit, url = made.oid, made.commit_url
    return PushResult(
        repo_id=repo_id,
        public=plan.public,
        revision=plan.revision,
        files=plan.files,
        uploaded=tuple(uploaded),
        removed=tuple(removed),
        commit=commit,
        url=url,
    )


def _is_there(path: Path, there: RepoFile | None) -> bool:
    """Whether a file has the content that the Hub lists: by SHA-256 if it is large (LFS or Xet), else by git's hash."""
    if there is None or there.size != path.stat().st_size:
        return False
    return git_blob_sha1(path) == there.blob_id if there.lfs is None else file_sha256(path) == there.lfs.sha256


def write_instead(plan: PushPlan, output: str | Path, *, overwrite: bool = False) -> Path:
    """Write the folder that would be pushed; it appears complete or not at all.

    Raises:
        Refusal: `output` exists and may not be replaced, or touches the student.
    """
    output = Path(output).expanduser()
    check_apart(output, plan.folder, "student")
    check_output(output, overwrite, None)
    with staged_folder(output, overwrite) as staging:
        for file in plan.files:
            copy = staging / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(plan.folder / file, copy)
    return output


def _check_names(repo_id: str, revision: str | None, commit_message: str | None) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise Refusal(f"repo_id {repo_id!r}: {reason}. Give owner/name.") from None
    if revision is not None and (not revision.strip() or re.search(r"[\s~^:?*\[\\]|\.\.|^-|^/|/$", revision)):
        raise Refusal(f"revision {revision!r}: not the name of a branch. Give one like main or two-heads.")
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        raise Refusal(f"revision {revision!r}: is a commit, which nothing can be added to. Give a branch.")
    if commit_message is not None and (not commit_message.strip() or "\n" in commit_message):
        raise Refusal(f"commit_message {commit_message!r}: not one line of text. The recipe follows by itself.")


def _check_card(folder: Path, needs_card: bool) -> None:
    card, report = folder / CARD_FILE, folder / EVALUATION_FOLDER / REPORT_FILE
    if not card.is_file():
        if needs_card:
            raise Refusal(
                f"{card}: missing, so nobody would know what this model is. Make it with hf-gqa card {folder} --report "
                f"REPORT, or push with --no-card."
            )
        return
    text = card.read_text(encoding="utf-8", errors="replace")
    if not is_ours(text):
        return  # the user's own words, which no report can bear out
    if not report.is_file():
        raise Refusal(f"{card}: its report {report} is missing. Make the card again with hf-gqa card --overwrite.")
    problems = lint_card(text, Report.read(report), folder)
    if problems:
        raise CheckFailed(
            f"{card}:{problems[0]} ({len(problems)} such problems). Make it again with hf-gqa card --overwrite."
        )


def _title(manifest: Manifest) -> str:
    heads = [row["num_key_value_heads"] for row in manifest.layer_plan]
    before = manifest.donor.get("num_key_value_heads") or ["?"]
    donor = " ".join(str(manifest.donor.get("name")).split())
    return f"{donor} with {_few(heads)} KV heads instead of {_few(before)}"


def _few(per_layer: list) -> str:
    return str(per_layer[0]) if len(set(per_layer)) == 1 else f"{min(per_layer)} to {max(per_layer)}"


def _description(manifest: Manifest) -> str:
    facts = {
        "plan": manifest.plan,
        "donor": {key: manifest.donor.get(key) for key in ("name", "revision", "weights_sha256")},
        "uptraining": manifest.uptraining,
        "versions": manifest.versions,
    } | ({} if manifest.refreshed is None else {"refreshed": manifest.refreshed})
    return yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)


def _check_visibility(plan: PushPlan, repo_id: str, private: bool) -> None:
    if private is plan.public:
        found, asked = ("private", "public") if private else ("public", "private")
        how = "leave --public out" if plan.public else "use --public"
        raise Refusal(
            f"{repo_id}: exists and is {found}, but shall be {asked}. Nothing was uploaded. Change it in its settings on "
            f"the Hub, {how}, or give another name."
        )


@contextmanager
def _clear_errors(repo_id: str, token: str) -> Iterator[None]:
    """Whatever the Hub's client raises becomes one line; the token is in none, whoever repeats it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they repeat what the server says
            yield
    except Refusal:
        raise
    except HfHubHTTPError as error:
        raise _answered(error, repo_id, token) from None
    except (HTTPError, OSError, json.JSONDecodeError, RuntimeError) as error:  # HTTPError: of the client's own httpx
        raise OSError(
            f"{repo_id}: the Hub at {constants.ENDPOINT} cannot be reached ({_said(error, token)}). Nothing was committed: "
            f"check the network and push again, or use --dry-run"
        ) from None
    except ValueError as error:
        raise Refusal(f"{repo_id}: cannot be pushed ({_said(error, token)}). Nothing was committed.") from None


def _answered(error: HfHubHTTPError, repo_id: str, token: str) -> Exception:
    status = error.response.status_code
    said = f"HTTP {status}: {_said(error, token)}"
    if status == 401:
        return Refusal(f"{repo_id}: the Hub does not accept the token ({said}). Run hf auth login with a valid one.")
    if status in (402, 403):
        return Refusal(
            f"{repo_id}: no permission to write there ({said}). Use a token with write access, or a name of your own."
        )
    if status == 404:
        return Refusal(f"{repo_id}: not found on the Hub, or hidden from this token ({said}). Check its name.")
    if 400 <= status < 500 and status not in (412, 429):
        return Refusal(f"{repo_id}: the Hub refuses it ({said}). Nothing was committed.")
    return OSError(f"{repo_id}: the Hub failed ({said}). Nothing was committed: push again later")


def _said(error: Exception, token: str) -> str:
    """What the server or the system said, on one line."""
    message = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return " ".join(message.replace(token, "<token>").split()).rstrip(".")[:300]
