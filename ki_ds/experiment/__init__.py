"""The experiment file: typed, read strictly, checked as a graph; its schedules."""
