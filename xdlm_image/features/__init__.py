"""What images are judged by: feature extractors and judges of classes, streamed statistics, the Fréchet distance."""
