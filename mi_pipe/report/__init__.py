"""The offline report: pages, figures and data files made of whatever artifacts there are.

One file a page: a page function takes artifacts and returns a `Page` (context, figures, data); `writer`
puts it on disk; `site` lists the pages and reads a finished report.
"""
