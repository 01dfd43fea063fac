"""Reports of runs: figures as pure functions, and one self-contained HTML file (`html.write_report`).

Nothing is imported here: matplotlib takes a second that `fit` need not wait for.
"""

__all__: list[str] = []
