# Trains the embedded example on a CPU, then answers over HTTP: docker build -t gr . && docker run -p 8000:8000 gr
FROM python:3.11-slim
WORKDIR /app
COPY requirements.txt pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu -r requirements.txt
COPY generative_recommenders generative_recommenders
COPY configs configs
COPY main.py ./
RUN pip install --no-cache-dir ".[serve]" && useradd --create-home reader && chown reader /app
USER reader
EXPOSE 8000
# a container that is started again goes on with its run, which ends at once where it is finished
CMD ["sh", "-c", "python main.py --run_dir=runs/example --auto_resume && exec python -m generative_recommenders.serve runs/example --host=0.0.0.0"]
