"""Configuration of a run: Trainer options, permitted classes, recipes, and the file that is saved in run_dir."""
