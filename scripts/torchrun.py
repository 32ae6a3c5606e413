"""torchrun, with the exit code of the process that failed first, and without a traceback of its own.

python scripts/torchrun.py --standalone --nproc-per-node 2 FILE [flags]        called by launch.sh
"""

import os
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def run() -> int:
    # of each process, or DistributedDataParallel's C++ tells that it found no unused parameters (distill/parallel.py)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        main()
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 128 - code  # killed by signal N: -N here, 128 + N in a shell
    except SignalException as error:  # torchrun passed it on; the processes have saved and ended
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(run())
