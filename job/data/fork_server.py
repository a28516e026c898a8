"""Preloaded by the fork server of loader processes, and imported nowhere else.

The server leaves the process group of its rank, and its workers with it: a signal to the whole
group, as torchrun and init programs of containers send it, must leave them serving until the rank
has saved. A worker ends when the server does, by torch's own watch on its parent.
"""

import os

from job.data import dataset as dataset  # imported once, for all workers

os.setsid()
