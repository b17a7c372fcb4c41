"""Measurements: benchmarks, quality runs, predicted against counted peaks. This package is not installed."""
