"""What ``pipelines/reproduce.py`` computes: tasks, cells, published numbers, tables."""
