// Go: net/http with its own resolver. HOST PORT PATH COUNT
package main

import (
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"strconv"
)

func main() {
	url := "http://" + net.JoinHostPort(os.Args[1], os.Args[2]) + os.Args[3]
	count, _ := strconv.Atoi(os.Args[4])
	for i := 0; i < count; i++ {
		var peer string
		trace := &httptrace.ClientTrace{GotConn: func(info httptrace.GotConnInfo) {
			peer, _, _ = net.SplitHostPort(info.Conn.RemoteAddr().String())
		}}
		request, err := http.NewRequest("GET", url, nil)
		if err != nil {
			log.Fatal(err)
		}
		request = request.WithContext(httptrace.WithClientTrace(request.Context(), trace))
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			log.Fatal(err)
		}
		body, err := io.ReadAll(response.Body)
		if err != nil {
			log.Fatal(err)
		}
		response.Body.Close()
		fmt.Println(response.Header.Get("X-Pod"), peer, string(body))
	}
}
