"""Tables and plots of committed results, for `benchmarks.report`: rows -> lines of Markdown."""
