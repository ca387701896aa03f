// Node: fetch's elder sister http.get, which tells the peer. HOST PORT PATH COUNT
import http from "node:http";

const [host, port, path, count] = process.argv.slice(2);

const get = () =>
  new Promise((resolve, reject) => {
    http.get({ host, port, path }, async (response) => {
      const peer = response.socket.remoteAddress;
      let body = "";
      for await (const chunk of response) body += chunk;
      resolve(`${response.headers["x-pod"]} ${peer} ${body}`);
    }).on("error", reject);
  });

for (let i = 0; i < Number(count); i++) console.log(await get());
