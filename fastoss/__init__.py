"""fastoss fine-tunes gpt-oss-20b on one GPU and proves what it did. Start reading at docs/architecture.md."""

__version__ = "0.1.0"
