// SPDX-License-Identifier: Apache-2.0

// Command bulkhead-agent runs the node: see agent. It exits with 2 when its
// configuration is wrong and with 1 when it cannot go on.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/bulkheadhq/bulkhead/agent"
	"github.com/bulkheadhq/bulkhead/agent/config"
)

var version = "dev" // set by the build

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("bulkhead-agent", flag.ContinueOnError)
	flags.SetOutput(stderr)
	file := flags.String("config", "/etc/bulkhead/bulkhead-agent.toml", "configuration `file`")
	sample := flags.Bool("sample", false, "print a configuration with every key explained, and exit")
	check := flags.Bool("check", false, "read configuration and tenants, say what is wrong, and exit")
	show := flags.Bool("version", false, "print the version and exit")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	switch {
	case *show:
		fmt.Fprintln(stdout, "bulkhead-agent", version)
		return 0
	case *sample:
		_, _ = stdout.Write(config.Sample)
		return 0
	}
	cfg, err := config.Load(*file)
	if err == nil {
		err = agent.CheckTenants(cfg)
	}
	if err != nil {
		fmt.Fprintln(stderr, "bulkhead-agent:", err)
		return 2
	}
	if *check {
		return 0
	}
	log := slog.New(cfg.LogHandler(stderr))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends it at once, which is safe
	err = agent.Run(ctx, agent.Options{
		Config: cfg, Version: version, Log: log,
		Notify: func(state string) { _, _ = daemon.SdNotify(false, state) }, // no systemd, nobody to tell
	})
	if err != nil {
		fmt.Fprintln(stderr, "bulkhead-agent:", err)
		return 1
	}
	return 0
}
