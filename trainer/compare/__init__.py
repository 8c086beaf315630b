"""The same training from several starts, compared in pairs: plan, runs, measures, statistics, report."""
