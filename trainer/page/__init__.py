"""run.html: a run to look at, in one file, while it trains and after it. Made from the files in the run's folder."""

from trainer.page.write import PAGE, write_page

__all__ = ["PAGE", "write_page"]
