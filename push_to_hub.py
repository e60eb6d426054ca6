"""
Publish a trained LAMB: check, render the card from what was measured, send one commit, and try what was sent.

    python push_to_hub.py runs/mini org/lamb-mini --dry_run repo_folder
    python push_to_hub.py runs/mini org/lamb-mini --private --tag v1 --verify examples/dog.mp3

The token is that of `hf auth login` or HF_TOKEN. Nothing is sent when something is wrong; run it again after an
interruption: what was uploaded is not uploaded twice.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output_dir of a recipe")
    parser.add_argument("repo_id", help="organisation/name")
    parser.add_argument("--dry_run", type=Path, metavar="FOLDER", help="write the repository there and send nothing")
    parser.add_argument(
        "--merge", action="store_true", help="fold LoRA in and publish all weights instead of the small ones"
    )
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--revision", help="branch to commit to")
    parser.add_argument("--create_pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--tag", help="tag the commit")
    parser.add_argument("--verify", metavar="SOUND", help="download into an empty cache, caption SOUND, compare")
    parser.add_argument("--max_shard_size", default="5GB", help="of a file of weights")
    options = parser.parse_args()
    if options.create_pr and options.revision not in (None, "main"):
        parser.error("--create_pr opens a branch of its own, from main: leave --revision out")

    from training_lamb.publishing import build_repository, problems, verify  # torch loads only for real work

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.dry_run or Path(temporary) / "repo"
        build_repository(options.run, folder, options.repo_id, options.merge, options.max_shard_size)
        if found := problems(folder):
            sys.exit("Not published:\n" + "\n".join(f"- {problem}" for problem in found))
        if options.dry_run:
            print(f"The repository is in {folder}; nothing was sent.")
            return
        try:
            commit = send(folder, options)
            print(f"Published as {commit.pr_url or commit.commit_url}")
            if options.verify:
                verify(folder, options.repo_id, commit.oid, options.verify)
        except (HfHubHTTPError, RuntimeError) as error:
            sys.exit(f"Not published: {str(error).strip().splitlines()[0]}")


def send(folder: Path, options: argparse.Namespace) -> Any:
    """The repository in one commit, so that nobody sees half of it; what is there already is not sent again."""
    api = HfApi()
    api.create_repo(options.repo_id, private=options.private or None, exist_ok=True)
    if options.revision and not options.create_pr:
        api.create_branch(options.repo_id, branch=options.revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=options.repo_id,
        folder_path=folder,
        commit_message=f"LAMB from {options.run.name}",
        revision=options.revision,
        create_pr=options.create_pr,
    )
    if options.tag:
        api.create_tag(options.repo_id, tag=options.tag, revision=commit.oid, exist_ok=True)
    return commit


if __name__ == "__main__":
    main()
