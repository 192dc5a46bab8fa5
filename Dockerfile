# docker build -t kl-f8-train . && docker run --gpus all --shm-size 8g kl-f8-train --version
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev  # for torch.compile
WORKDIR /kl-f8-train
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY configs configs
COPY kl_f8_train kl_f8_train
RUN pip install --no-cache-dir -c constraints.txt ".[demo,eval,hub,s3,tensorboard]"
ENV KL_F8_TRAIN_CACHE=/cache TORCHINDUCTOR_CACHE_DIR=/cache/compiled
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["kl-f8-train"]
