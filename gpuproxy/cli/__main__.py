"""``python -m gpuproxy.cli`` is ``gpuproxy``."""

from gpuproxy.cli import main

if __name__ == "__main__":
    main()
