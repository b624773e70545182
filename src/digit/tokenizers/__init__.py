"""Images to tokens: frozen encoders, k-means codebooks, the discriminative tokenizer and the VQ tokenizer."""
