"""Will it work, and what will it cost? Doctor, benchmark, prediction."""
