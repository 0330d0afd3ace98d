// SPDX-License-Identifier: Apache-2.0

// Command bulkhead is what people and scripts use to run and look at
// sandboxes. It talks to the agent of one node over its unix socket, and for
// usage also to a gateway. It decides nothing and keeps nothing on disk.
//
// Standard output carries what was asked for and nothing else; everything that
// is said about it goes to standard error, one line each. Exit codes: 0, 1 for
// a failure, 2 for a command line that makes no sense, and for run, exec and
// attach the command's own.
//
// An agent may be restarted or upgraded under a client: sandboxes run on, and
// the commands that wait (run, wait, logs -f, ls --watch) wait for it to come
// back and go on where they were.
package main

import (
	"io"
	"os"

	"google.golang.org/grpc/grpclog"
)

// version is set by the linker.
var version = "dev"

func main() {
	// What gRPC has to say, the errors say too, and in one line.
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	os.Exit(run(os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
