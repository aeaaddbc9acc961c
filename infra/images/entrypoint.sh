#!/usr/bin/env bash
# Starts a pod of the image: Spark on Kubernetes calls it with "driver" and the arguments of spark-submit, or with
# "executor" and the executor's settings in its environment; any other command is run unchanged.
set -euo pipefail
export SPARK_HOME="${SPARK_HOME:-$(python -c 'import os, pyspark; print(os.path.dirname(pyspark.__file__))')}"

case "${1:-}" in
  driver)
    shift
    address="${SPARK_DRIVER_BIND_ADDRESS:?is set by Spark on Kubernetes in the driver pod}"
    exec "$SPARK_HOME/bin/spark-submit" --deploy-mode client --conf "spark.driver.bindAddress=$address" \
      --conf "spark.executorEnv.SPARK_DRIVER_POD_IP=$address" "$@"
    ;;
  executor)
    cd "${TMPDIR:-/tmp}"  # Spark copies the code that the driver sends into the working folder; the root is read-only
    options=()
    for ((i = 0; ; i++)); do
      option="SPARK_JAVA_OPT_$i"
      [[ -v "$option" ]] || break
      options+=("${!option}")
    done
    exec java ${options[@]+"${options[@]}"} "-Xms$SPARK_EXECUTOR_MEMORY" "-Xmx$SPARK_EXECUTOR_MEMORY" \
      -cp "${SPARK_CONF_DIR:-$SPARK_HOME/conf}:${SPARK_EXTRA_CLASSPATH:+$SPARK_EXTRA_CLASSPATH:}$SPARK_HOME/jars/*" \
      org.apache.spark.scheduler.cluster.k8s.KubernetesExecutorBackend \
      --driver-url "$SPARK_DRIVER_URL" --executor-id "$SPARK_EXECUTOR_ID" --cores "$SPARK_EXECUTOR_CORES" --app-id "$SPARK_APPLICATION_ID" \
      --hostname "$SPARK_EXECUTOR_POD_IP" --resourceProfileId "$SPARK_RESOURCE_PROFILE_ID" --podName "$SPARK_EXECUTOR_POD_NAME"
    ;;
  *) exec "$@" ;;
esac
