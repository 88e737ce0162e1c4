"""What images are judged by: feature extractors, their training, and streamed statistics of what they find."""
