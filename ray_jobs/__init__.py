"""GPU work, run inside the Ray cluster."""

import logging
import os

# Where the package `kernels` is installed, transformers runs kernels of the hub unless told otherwise: code from the
# network in a training, and other numbers than its own layers compute. It reads this once, while it is imported, which
# only ray_jobs does. Who sets USE_HUB_KERNELS=1 in the environment of the jobs consents.
os.environ.setdefault("USE_HUB_KERNELS", "0")

# bitsandbytes warns while it is imported, and DeepSpeed when it first looks for a device: before a job could ask them
# not to. DeepSpeed sets its logger's level itself, while a filter stays.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
