"""One rank of `train_group`: it calls the function that it reads, and writes what that returns.

A module of its own, by whose name tests/warm.py forks it from a process that has imported everything and done nothing.
"""

import gc
import os
import pickle
import sys
import traceback
import warnings


def main() -> None:
    results = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed goes to the log
    warnings.simplefilter("ignore")
    gc.freeze()  # what was imported is never garbage, and DeepSpeed collects often
    import torch
    import torch.distributed as dist

    try:
        function, arguments, use_gpu = pickle.load(sys.stdin.buffer)  # noqa: S301 - of the test itself
        if use_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # as Ray Train does before a training function
        dist.init_process_group("nccl" if use_gpu else "gloo")
        result = function(*arguments)
        dist.barrier()
        dist.destroy_process_group()
        with results:
            pickle.dump(result, results)
    except BaseException:
        traceback.print_exc()
        code = 1
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
