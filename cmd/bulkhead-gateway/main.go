// SPDX-License-Identifier: Apache-2.0

// Command bulkhead-gateway keeps the usage ledger of a site.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/bulkheadhq/bulkhead/gateway"
	"github.com/bulkheadhq/bulkhead/gateway/config"
)

// version is set by the linker in a release.
var version string

type usageError struct{ error } // a command line that cannot be used

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := command().ExecuteContext(ctx)
	stop()
	if err == nil {
		return
	}
	fmt.Fprintf(os.Stderr, "bulkhead-gateway: %s\n", strings.ReplaceAll(err.Error(), "\n", "; "))
	if errors.As(err, new(*config.Error)) || errors.As(err, new(usageError)) {
		os.Exit(2)
	}
	os.Exit(1)
}

func command() *cobra.Command {
	if info, ok := debug.ReadBuildInfo(); ok && version == "" {
		version = info.Main.Version
	}
	var file, node string
	noArgs := func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usageError{fmt.Errorf("unknown command %q; see %s --help", args[0], cmd.CommandPath())}
		}
		return nil
	}
	root := &cobra.Command{
		Use: "bulkhead-gateway", Short: "Keep the usage ledger of a site",
		Version: version, Args: noArgs, SilenceUsage: true, SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(file)
			if err != nil {
				return err
			}
			return gateway.Run(cmd.Context(), cfg, gateway.NewLogger(cfg.Log, os.Stderr))
		},
	}
	verify := &cobra.Command{
		Use: "verify", Short: "Walk the hash chain of every node and name the first break", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := config.Load(file)
			if err != nil {
				return err
			}
			return gateway.Verify(cmd.Context(), cfg, node, cmd.OutOrStdout())
		},
	}
	root.PersistentFlags().StringVar(&file, "config", config.DefaultPath, "configuration file")
	verify.Flags().StringVar(&node, "node", "", "only this node")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.CompletionOptions.DisableDefaultCmd = true
	root.AddCommand(verify)
	return root
}
