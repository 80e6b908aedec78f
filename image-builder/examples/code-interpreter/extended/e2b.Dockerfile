FROM code-interpreter-v1
RUN pip install cowsay
