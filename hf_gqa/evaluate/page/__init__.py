"""The report as one HTML page, and the folder that holds both."""
