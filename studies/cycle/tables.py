"""The tables of docs/study.md, of the figures in results/: `python studies/cycle/tables.py` writes them there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from job.comparison.compared import Figures, Setting, figures_of
from job.comparison.kept import read_kept
from job.comparison.runs import Run

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "study.md"
TABLE = re.compile(r"(?<=<!-- table )(\w+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)
PERCENTS = (3, 10, 30, 100)
WITHOUT, WITH = ("none", "none_of_pairs"), ("text", "text_of_pairs")
SCARCE = {
    "l2t/ce": "L2T cross-entropy, nats",
    "l2t/token_acc": "L2T tokens right",
    "t2l/x0_mse": "T2L squared error",
    "probe/t2l2t_acc@0": "T2L2T tokens right",
    "probe/l2t/re_encoded_at_1": "L2T re-encoded",
    "probe/t2l2t/re_encoded_at_1": "T2L2T re-encoded",
}
CHEAT = {
    "probe/t2l2t_acc@0": "as they are",
    "probe/t2l2t_acc@0.25": "noise of 0.25",
    "probe/t2l2t_acc@0.5": "noise of 0.5",
    "probe/t2l2t_acc@1": "noise of 1",
    "probe/stranger_acc": "another decoder",
    "probe/t2l2t/re_encoded_cos": "source encoder, cosine",
    "t2l/x0_mse": "T2L squared error",
}
PAIRED = {key: SCARCE[key] for key in SCARCE if key != "l2t/token_acc"}
PARAMETERIZATIONS = {"full": ("v_param", "x0"), "random": ("v_param", "x0", "epsilon")}
WEIGHTS = ((0.0, 0.0), (0.1, 0.0), (0.5, 0.0), (0.0, 0.1), (0.0, 0.5), (0.1, 0.1), (0.5, 0.5))


def arm(run: Run) -> str:
    """The name of a scarce run's arm."""
    return str(run.settings["logging.run_name"])


def row(first: str, cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join([first, *cells])} |"


def header(first: str, columns: Sequence[str]) -> list[str]:
    """The head of a Markdown table."""
    return [row(first, columns), f"|{'---|' * (len(columns) + 1)}"]


def mean(figures: Figures) -> str:
    """A mean over seeds."""
    return "" if figures.estimate is None else number(figures.estimate.mean)


def number(value: float, sign: str = "") -> str:
    """Three decimals; what is out of all proportion by its power of ten."""
    return f"{value:{sign}.3f}" if abs(value) < 1000 else f"{value:{sign}.1e}"


def change(figures: Figures) -> str:
    """A mean, and its paired difference to the baseline with its interval; bold where no sign-flip is as large."""
    found = figures.difference
    if found is None:
        return mean(figures)
    text = number(found.estimate.mean, "+")
    if found.estimate.low is not None and found.estimate.high is not None:
        text += f" ({number(found.estimate.low, '+')} to {number(found.estimate.high, '+')})"
    return f"**{text}**" if found.p is not None and found.p < 0.05 else text


def scarce() -> list[str]:
    """What the text cycle changes, by the share of texts whose latent is known."""
    lines = header("latents known", ["cycle", "seeds", *SCARCE.values()])
    return lines + [line for percent in PERCENTS for line in without_and_with(f"{percent}%", f"data/study/{percent}")]


def sentences() -> list[str]:
    """What it changes with longer texts."""
    return header("latents known", ["cycle", "seeds", *SCARCE.values()]) + without_and_with(
        "10%", "data/study/sentences"
    )


def without_and_with(known: str, directory: str) -> list[str]:
    """Two lines about the runs on the data of a directory: without the text cycle, and what it changes."""
    runs = [run for run in read_kept(RESULTS / "scarce.jsonl") if run.settings["data.dir"] == directory]
    off = Setting({}, [run for run in runs if arm(run) in WITHOUT])
    on = Setting({}, [run for run in runs if arm(run) in WITH])
    means = [mean(figures_of(off, off, key, None)) for key in SCARCE]
    changes = [change(figures_of(on, off, key, None)) for key in SCARCE]
    return [row(known, ["off", str(len(off.runs)), *means]), row("", ["on, change", str(len(on.runs)), *changes])]


def cheat() -> list[str]:
    """Tokens right that are decoded from predicted latents, on ways that break a hidden code."""
    runs = [run for run in read_kept(RESULTS / "scarce.jsonl") if run.settings["data.dir"] == "data/study/10"]
    lines = header("10% of latents known", ["seeds", *CHEAT.values()])
    for name, words in {
        "none": "no cycle",
        "text": "text cycle, gradient stopped at the latent",
        "text_through": "text cycle, gradient through the latent",
    }.items():
        setting = Setting({}, [run for run in runs if arm(run) == name])
        lines.append(
            row(words, [str(len(setting.runs)), *(mean(figures_of(setting, setting, k, None)) for k in CHEAT)])
        )
    return lines


def paired() -> list[str]:
    """What the weights of the cycles change where every text has its latent."""
    runs = read_kept(RESULTS / "paired.jsonl")
    lines = header("latent_t_mode, parameterization", ["text, latent weight", "seeds", *PAIRED.values()])
    for mode, parameterizations in PARAMETERIZATIONS.items():
        for parameterization in parameterizations:
            off: Setting | None = None
            for text, latent in WEIGHTS:
                wanted = {
                    "loss.latent_t_mode": mode,
                    "model.latent_parameterization": parameterization,
                    "loss.cycle_text_weight": text,
                    "loss.cycle_latent_weight": latent,
                }
                here = Setting({}, [run for run in runs if all(run.settings[k] == v for k, v in wanted.items())])
                if not here.runs:
                    continue
                off = off or here
                cells = [change(figures_of(here, off, key, None)) for key in PAIRED]
                first = f"{mode}, {parameterization}" if here is off else ""
                lines.append(row(first, [f"{text:g}, {latent:g}", str(len(here.runs)), *cells]))
    return lines


TABLES = {"scarce": scarce, "sentences": sentences, "cheat": cheat, "paired": paired}


def with_tables(page: str) -> str:
    """A page whose tables are those of today's figures."""
    return TABLE.sub(lambda found: "\n".join([f"{found[1]}{found[2]}", *TABLES[found[1]](), "", ""]), page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
