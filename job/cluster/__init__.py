"""Which process this is among those of the job, and how they talk."""
