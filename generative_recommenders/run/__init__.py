"""Run folders: files, logs, summaries, plots."""
