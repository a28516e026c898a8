"""This operating system process: signals, threads, temporary folders, output."""
