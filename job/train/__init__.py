"""The trainer, a fit from beginning to end, and the searches of ``tune``."""
