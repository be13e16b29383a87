"""What is said about models: benchmark.py how fast, quality.py how well, compare.py which quantization,
inspection.py what a file is made of. Each gives data; the commands print it."""
