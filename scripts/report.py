"""One static page over all papers (report/index.html); --publish makes a finished run the committed reference."""

import argparse
import os
import sys
from pathlib import Path

from shared.experiments.errors import UserError
from shared.experiments.paper import load_paper, load_papers, paper_names

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--publish", action="store_true", help="copy results and figures to papers/PAPER/results/SCALE")
    parser.add_argument("--paper", default=os.environ.get("PAPER"), help="with --publish; or PAPER=...")
    parser.add_argument("--scale", default=os.environ.get("SCALE") or "tiny", help="with --publish; or SCALE=...")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # for papers.NAME.config
    try:
        return publish(args.paper, args.scale) if args.publish else report()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def publish(name: str | None, scale: str) -> int:
    from shared.experiments.publish import publish, write_index

    names = paper_names(ROOT / "papers")
    if not name:
        raise UserError(f"which paper? make publish PAPER=NAME with one of: {', '.join(names) or 'none yet'}")
    target = publish(load_paper(name, ROOT / "papers"), scale)
    write_index(ROOT / "papers")
    print(f"published to {target.relative_to(ROOT)}; commit it together with papers/README.md")
    return 0


def report() -> int:
    from shared.experiments.publish import write_index
    from shared.experiments.site import write_site

    papers, broken = load_papers(ROOT / "papers")
    index = write_site(papers, ROOT / "report")
    print(index.relative_to(ROOT))
    if broken:  # a table without them would look as if they did not exist
        reasons = [f"error: {reason}" for reason in broken.values()]
        print(*reasons, "papers/README.md is left as it is", sep="\n", file=sys.stderr)
        return 2
    if write_index(ROOT / "papers"):
        print("papers/README.md: table of papers brought up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
