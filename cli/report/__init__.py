"""``lentando report``: the logs of one or several runs, drawn as one HTML page."""
