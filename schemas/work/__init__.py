"""Messages of jobs, groups, windows and moves."""
