"""Claims that a lower -ELBO is not chance, judged from means and deviations over seeds.

A claim *holds* if the means differ so by more than two standard errors of the difference, is
*refuted* if they differ so the other way, and is else *open*. Where nothing differs, the rule says
so wrongly, each way, in 5.8 % of cases with three seeds of each, 4.1 % with five, 3.1 % with ten
(simulated with normal values, as `tests/experiments/test_gather.py` does). Beside it stands the
two-sided p of Welch's test, which takes the number of seeds into account.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from experiments.output import Row, markdown
from lib.config import ConfigError
from lib.optional import optional


def verdict(difference: float, error: float) -> str:
    """Of the claim that a difference, of which the standard error is known, is negative."""
    if abs(difference) <= 2 * error:
        return "open"
    return "holds" if difference < 0 else "refuted"


def claimed(name: str, table: Sequence[Row]) -> Row:
    """The only row of this name; ConfigError if there is none to judge."""
    rows = [row for row in table if row["name"] == name]
    problem = f"there {'are several configurations' if rows else 'is no run'} of this name"
    if len(rows) == 1:
        problem = "there are runs that are not finished of this name"
        if rows[0]["finished"] == rows[0]["seeds"]:
            problem = "" if rows[0]["neg_elbo_n"] else "no -ELBO of it is finite"
    if problem:
        raise ConfigError(f"--claim {name}: {problem}")
    return rows[0]


def judged(claims: Sequence[tuple[str, str]], table: Sequence[Row]) -> str:
    """For people: differences of claimed lower and higher -ELBO, and whether the claims hold.

    Raises:
        ConfigError: if a name is not that of exactly one row of finished runs, or the rows' units
            differ.
    """
    heading = ["claim: −ELBO is lower", "than", "difference", "standard error", "Welch's p"]
    lines = [[*heading, "the claim"]]
    for names in claims:
        lower, higher = pair = [claimed(name, table) for name in names]
        if (lower["unit"], lower["dataset"]) != (higher["unit"], higher["dataset"]):
            raise ConfigError(f"--claim {' '.join(names)}: their data or units differ")
        difference = lower["neg_elbo_mean"] - higher["neg_elbo_mean"]
        judgement = ["-", "-", "open: it needs two seeds of each"]
        if min(row["neg_elbo_n"] for row in pair) > 1:
            error = math.sqrt(sum(row["neg_elbo_std"] ** 2 / row["neg_elbo_n"] for row in pair))
            judgement = [f"{error:.3f}", welch(lower, higher), verdict(difference, error)]
        lines.append([*names, f"{difference:+.3f}", *judgement])
    return markdown(lines)


def welch(*pair: Row) -> str:
    """The two-sided p of Welch's test of equal means."""
    stats = optional("scipy.stats", "Welch's test", "metrics", ConfigError)
    if not any(row["neg_elbo_std"] for row in pair):
        return "-"
    numbers = [row[f"neg_elbo_{of}"] for row in pair for of in ("mean", "std", "n")]
    p = stats.ttest_ind_from_stats(*numbers, equal_var=False).pvalue
    return "<0.01" if p < 0.01 else f"{p:.2f}"
