"""What a person sees while a run trains: a bar on a terminal, a line per log interval in a file."""

from __future__ import annotations

import contextlib
import sys
import time

from tqdm import tqdm

SHORT = {
    "loss": "loss",
    "base_l2t_text_loss": "l2t",
    "base_t2l_latent_loss": "t2l",
    "cycle_text_loss": "cycle_text",
    "cycle_latent_loss": "cycle_latent",
    "text_loss": "text",
    "latent_loss": "latent",
}


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def rate(tokens_per_second: float) -> str:
    """Tokens per second in three digits."""
    return (
        f"{tokens_per_second / 1000:.3g}k tokens/s"
        if tokens_per_second >= 1000
        else f"{tokens_per_second:.3g} tokens/s"
    )


class Progress:
    """Progress of a run of `total` steps that starts at `step`; silent unless `show` (rank 0)."""

    def __init__(self, total: int, step: int, show: bool) -> None:
        self.total, self.first, self.started = total, step, time.monotonic()
        self.show = show
        self.bar = (
            tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, smoothing=0.1)
            if show and sys.stderr.isatty()
            else None
        )

    def update(self, step: int) -> None:
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Show the values of a log interval that ended with `step` steps done."""
        terms = "  ".join(f"{short} {values[name]:.4g}" for name, short in SHORT.items() if name in values)
        if self.bar is not None:
            self.bar.set_postfix_str(f"{terms}  {rate(values['tokens_per_second'])}")
        elif self.show:
            left = (time.monotonic() - self.started) / max(1, step - self.first) * (self.total - step)
            self._print(f"step {step}/{self.total}  {terms}  {rate(values['tokens_per_second'])}  {clock(left)} left")

    def say(self, text: str) -> None:
        """A line that does not break the bar."""
        if self.bar is not None:
            self.bar.write(text)
        elif self.show:
            self._print(text)

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError):  # whoever read the output has gone; that must not end a run
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
