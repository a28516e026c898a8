"""The report of a run: ``report.json``, ``report.html``, the summary on the terminal and the comparison of runs."""
