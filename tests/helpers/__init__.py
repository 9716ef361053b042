"""What the tests share: tiny models, toy data, Trainers and launches of two processes."""
