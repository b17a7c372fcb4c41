"""All that measures: benchmarks, quality runs, the planner against counted peaks. Nothing of it is installed."""
