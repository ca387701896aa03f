// Rust: std::net::TcpStream. HOST PORT PATH COUNT
use std::env;
use std::io::{Read, Result, Write};
use std::net::TcpStream;

fn main() -> Result<()> {
    let args: Vec<String> = env::args().collect();
    let (host, port, path) = (&args[1], &args[2], &args[3]);
    for _ in 0..args[4].parse().unwrap() {
        let mut stream = TcpStream::connect(format!("{host}:{port}"))?;
        let peer = stream.peer_addr()?.ip();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let pod = head.lines().find_map(|line| line.strip_prefix("X-Pod: ")).unwrap();
        println!("{pod} {peer} {body}");
    }
    Ok(())
}
