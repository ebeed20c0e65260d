"""Peak memory of this process."""

import resource
import sys
from pathlib import Path


def reset_peak() -> None:
    """Forgets earlier peaks; on systems without /proc the peak of the whole process so far remains."""
    if sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return  # a container may forbid it


def peak_bytes() -> int:
    """Most resident memory held at once."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would also count what this process was before exec
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
